"""How bytes are stored and untrusted files are read. Imports none of the rooms."""
