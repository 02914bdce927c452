"""The papers. Importing this package offers every variant to timm as `replivit_<variant>`."""

from harness.timm_bridge import register_all

register_all()
