"""Diagnoses failures: the first module that diverges, and the smallest input that fails."""
