"""Processes, devices, number formats and memory."""
