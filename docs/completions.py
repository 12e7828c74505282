"""The picture of completed series in the README.

python -m ncfast.train --dataset TwoPatterns --preset paper --stage1-epochs 250 --stage2-epochs 750 --out runs/TP
python docs/completions.py --run runs/TP --dataset TwoPatterns --out docs/completions.png
"""

import argparse
from pathlib import Path

import numpy as np

import ncfast
from ncfast.data.sources import load_dataset
from ncfast.evaluation.plots import draw_completions, write_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--dataset", required=True, help="the data set it was trained on; its test series are completed"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--series", type=int, default=2, help="how many test series [2]")
    parser.add_argument("--draws", type=int, default=12, help="completions of each [12]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of series and of the draws [0]")
    options = parser.parse_args()

    model = ncfast.load(options.run)
    generator = np.random.default_rng(options.seed)
    X = load_dataset(options.dataset).X_test
    real = X[np.sort(generator.choice(len(X), options.series, replace=False))]
    t = np.arange(model.data.length) / model.data.length
    observed = {
        "forecasting": t < 0.6,
        "interpolation of a gap": (t < 0.35) | (t > 0.65),
        "imputation, 40 % missing at random": generator.random(len(t)) > 0.4,
    }
    drawn = {
        task: model.sample(options.draws * len(real), context=real, mask=seen, seed=options.seed)[0]
        for task, seen in observed.items()
    }
    title = f"{model.data.name}: observed (blue), completions (red), what really was (dotted)"
    write_figure(draw_completions(real, observed, drawn, title), options.out)


if __name__ == "__main__":
    main()
