"""Tables of what is on disk: block formats, recipes, roles, container keys. No I/O and no arrays here."""
