"""The verdict of paired gains."""
import numpy as np
def rejected(gains: np.ndarray) -> bool:
    return gains.mean() + 1.645 * gains.std(ddof=1) / len(gains) ** 0.5 <= 0
