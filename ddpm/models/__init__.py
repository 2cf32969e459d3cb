"""The networks, and their averaged weights. Imports only torch.

A ValueError names the parameter, its value, and what would be right.
"""
