"""A column of the report: how many answers are wrong although the model is sure of them."""

from first_trl import register_metric


@register_metric("sure_and_wrong", title="Sure and wrong %", scale=100, digits=1)
def sure_and_wrong(*, confidence, correct, probabilities, gold):
    assert probabilities is None or len(probabilities) == len(gold) == len(confidence)
    return float(((confidence > 0.5) & ~correct).mean())
