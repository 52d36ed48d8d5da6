"""How good is an attribution? Counterfactual metrics (retraining, patching) and label metrics."""
