"""Inputs with results worked out in rational arithmetic (right-closed bins)."""

test_cases = [
    {
        "predictions": [0.25, 0.25, 0.55, 0.75, 0.75],
        "references": [0, 0, 1, 1, 1],
        "kwargs": {"n_bins": 2},
        "result": {"ece": 0.29, "mce": 19 / 60},
    },
    {
        "predictions": [0.95, 1.0],
        "references": [1, 0],
        "kwargs": {"n_bins": 10},
        "result": {"ece": 0.475, "mce": 0.475, "rmsce": 0.475},
    },
    {
        "predictions": [0.1, 0.2, 0.3, 0.35],
        "references": [1, 0, 1, 0],
        "kwargs": {"n_bins": 10, "bin_edges": "left"},
        "result": {"ece": 0.3625, "mce": 0.9},
    },
    {
        "predictions": [[0.6, 0.2, 0.2], [0.0, 0.95, 0.05], [0.7, 0.1, 0.2]],
        "references": [0, 1, 2],
        "kwargs": {},
        "result": {"ece": 23 / 60, "accuracy": 2 / 3, "mean_confidence": 0.75},
    },
]
