"""An ordinary transformers checkpoint: every weight dense."""

from pathlib import Path

from transformers import PreTrainedModel

from hf_approx.exports.folders import Export, exported_report, write_model


def export_dense(model: PreTrainedModel, source: Path, output: Path) -> Export:
    """Write the decoded model, which is then no longer packed in memory either; see `export_model`."""
    model.dequantize()
    return Export(output, write_model(model, source, output, report=exported_report(source)))
