"""Evaluation with lm-eval, comparison of models, and the leaderboard's checks."""
