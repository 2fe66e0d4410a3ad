"""Searchers: which architectures of a trained supernet to score next. Codes in, codes out; nothing here runs a network."""
