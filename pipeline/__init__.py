"""What is run, where, and what is done already: manifests, plans, records and the supervisor."""
