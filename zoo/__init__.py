"""Rewards with needs of their own, one file each, imported when named; rewards.py has the others.

grammar.py, loading.py and jsonl.py are what they share.
"""
