"""Graphs of torch.fx: ops of ours, questions about values, cuts, masks, the verifier, text."""
