"""Servers, processes, hosts and data of the tests. Programs outside find the package with PYTHONPATH=tests."""
