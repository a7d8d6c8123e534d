"""The mathematics: source weights, log-probability sums, SFT and preference losses. Imports torch alone."""
