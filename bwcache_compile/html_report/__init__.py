"""The HTML report of a cached model: one file that shows what was found, what the passes did, and what a run did."""

from bwcache_compile.html_report.data import report_data
from bwcache_compile.html_report.node_data import write_node_data
from bwcache_compile.html_report.page import write_report

__all__ = ["report_data", "write_node_data", "write_report"]
