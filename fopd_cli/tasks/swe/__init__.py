"""Coding agents: repositories with a bug, mini-SWE-agent's scaffold, the instance's own tests as the
judge.
"""
