"""report.html of a run: one file with its numbers, curves and configuration."""

import base64
import html
from typing import Any

from flaxres.train.workdir import Workdir, write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; font-weight: normal; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, body: str) -> str:
    """A self-contained page around some HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def table(values: dict[str, Any]) -> str:
    """Two columns of names and values."""
    rows = "\n".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_text(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>\n{rows}\n</table>"


def picture(path: Any, alt: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def write_run(work: Workdir, result: dict[str, Any]) -> None:
    """Write the report of a run."""
    config = work.config()
    parts = ["<h2>Result</h2>", table(_readable(result))]
    if work.curves.is_file():
        parts += ["<h2>Curves</h2>", picture(work.curves, "loss, error and learning rate by step")]
    parts += ["<h2>Configuration</h2>", table(config.to_json())]
    parts += ["<h2>Made by</h2>", table(work.origin())]
    write_text(work.report, page(f"{config.model} on {config.data}", "\n".join(parts)))


def _readable(result: dict[str, Any]) -> dict[str, str]:
    """The numbers of a result as a person says them; what did not happen is left out."""
    seconds, shares = result["time_to_first_step"], result["shares"]
    rows = {
        "test accuracy": f"{result['accuracy']:.2%}" if result["examples"] else None,
        "test loss": f"{result['loss']:.4f}" if result["examples"] else None,
        "test examples": f"{result['examples']:,}" if result["examples"] else None,
        "steps": f"{result['step']:,}",
        "images a second": f"{result['images_per_second']:,.0f}" if seconds else None,
        "first step after": f"{seconds:.1f} s" if seconds else None,
        "time": ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
        "went on from step": result["resumed_from"],
        "stopped by": result["stopped_by"],
        "updates left out": result["skipped"] or None,
        "unreadable examples": result["corrupt"] or None,
        "sha256 of the parameters": result["params_sha256"],
    }
    return {name: str(text) for name, text in rows.items() if text is not None}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)
