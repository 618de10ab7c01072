"""Test tasks: their questions and answers, and samplers as models of the lm-evaluation-harness."""
