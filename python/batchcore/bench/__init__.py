"""Measuring: ways to run a set of prompts, and what describes the machine they ran on."""
