"""The networks, and their averaged weights. Imports only torch."""
