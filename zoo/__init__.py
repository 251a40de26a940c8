"""Rewards with needs of their own, one file each, loaded when named; rewards.py has the others.

loading.py is what they share.
"""
