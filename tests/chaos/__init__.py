"""Whole runs under blows: every process killed, Redis killed, filled and emptied, a trainer stopped
and revived beside its successor.
"""
