"""Measuring speed and memory: the sides compared, the gate before timing, timing, memory, the report and its plot."""
