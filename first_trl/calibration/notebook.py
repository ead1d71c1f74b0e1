"""How a calibration report looks in a notebook and at the prompt."""

import base64
import io
from typing import Any


_SCORES = (
    "n", "ece", "mce", "rmsce", "ece_debiased", "smece", "accuracy", "mean_confidence", "signed_gap", "trust", "brier", "nll",
    "auroc", "aurc",
)  # fmt: skip
_BINS = ("count", "confidence", "accuracy", "gap")
_TEMPLATE = """\
<div class="calibration-report">
<table><caption>{{ config.n_bins }} bins, strategy {{ config.strategy }}, norm {{ config.norm }}, mode {{ config.mode }}</caption>
<thead><tr>{% for name, _ in scores %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody><tr>{% for _, text in scores %}<td>{{ text }}</td>{% endfor %}</tr></tbody></table>
{% for text in notes %}<p>{{ text }}</p>
{% endfor %}{% if picture %}<img alt="Reliability diagram" src="data:image/png;base64,{{ picture }}">
{% endif %}{% if bins %}<details><summary>Bins</summary><table>
<thead><tr><th>bin</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in bins %}<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></details>
{% endif %}</div>
"""


class CalibrationReport(dict[str, Any]):
    """
    The dictionary that [`calibration_report`] returns. In a notebook it shows its scores, diagram and bins, at the prompt one
    line; everything else is that of a `dict`.
    """

    def __repr__(self) -> str:
        parts = (
            [f"n={self['n']}", f"ece={_shown(self['ece'])}{self._interval()}"] if "n" in self and "ece" in self else []
        )
        parts += [
            f"{key}={_shown(self[key])}"
            for key in ("accuracy", "mean_confidence", "p_value")
            if self.get(key) is not None
        ]
        return f"CalibrationReport({', '.join(parts)}; keys: {', '.join(self)})"

    def _repr_html_(self) -> str | None:
        try:
            from jinja2 import Environment
        except ImportError:
            return None
        notes = [f"Interval of ece{self._interval()}."] if self._interval() else []
        if self.get("p_value") is not None:
            notes.append(f"A calibrated model scores {self['null_mean']:.4f} on average, p = {self['p_value']:.3f}.")
        bins = self.get("bins") or {}
        rows = [
            (f"{low:.3g} to {high:.3g}", *(_shown(bins[name][i]) for name in _BINS))
            for i, (low, high) in enumerate(zip(bins.get("lower", ()), bins.get("upper", ()), strict=True))
        ]
        return (
            Environment(autoescape=True)
            .from_string(_TEMPLATE)
            .render(
                config=self.get("config") or {},
                scores=[(name, _shown(self[name])) for name in _SCORES if self.get(name) is not None],
                notes=[*notes, *(self.get("warnings") or ())],
                picture=self._picture(),
                columns=_BINS,
                bins=rows,
            )
        )

    def _interval(self) -> str:
        low, high = self.get("ci_low"), self.get("ci_high")
        return "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"

    def _picture(self) -> str | None:
        """The diagram as base64, where there are bins to draw and matplotlib to draw them."""
        from .diagram import reliability_diagram, save_figure

        if "bins" not in self:
            return None
        buffer = io.BytesIO()
        try:
            save_figure(reliability_diagram(self), buffer, dpi=80)
        except ImportError:
            return None
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def _shown(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
