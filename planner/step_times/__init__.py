"""Step times and transfer times of hardware: by formula, by coefficients, by table, by measured profile."""
