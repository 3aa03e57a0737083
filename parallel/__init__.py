"""Sequence parallel: token shards, collectives, wire protocol, worker pool, worker program."""
