"""Tests of fewbits.train."""
