"""Kinds of files to damage, one module each; found by themselves."""
