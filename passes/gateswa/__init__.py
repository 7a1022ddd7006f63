"""The GateSWA pass: which layers get a sliding window, and the closed-form start of what stands for the rest."""
