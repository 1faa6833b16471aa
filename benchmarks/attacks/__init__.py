"""Attacks on a federation, run for real: one engine for the benchmark and for the tests.

``world`` has the data, the model and the training; ``threats`` says what hostile contributors send;
``defences`` turns what was sent into a step, by the functions that ``moshi-hub merge`` calls;
``federation`` plays the rounds; ``proofs`` names the tests that show each refusal.
"""
