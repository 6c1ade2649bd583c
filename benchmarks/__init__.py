"""Benchmarks of fewbits against float and against its peers."""
