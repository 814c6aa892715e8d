"""Scores, statistics and plots of one stage and of many."""
