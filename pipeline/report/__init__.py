"""`lipprep report`: the whole of a data set on one page that needs no network.

`gather` chooses what is shown, as plain data; `pictures` reads the crops and frames of what was chosen and makes
pictures of them; `charts` draws numbers; `page` puts all of it into the template.
"""
