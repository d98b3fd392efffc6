"""Backends: each turns a lane program into something that runs."""
