"""Filling image codes into rows: pictures in chunks, a journal of codes, TSV files and shards out."""
