"""axolotl's plugin: our classes for `nemotron_h`, in its YAML file.

    plugins:
      - nemotron_h_hf.integrations.axolotl.Plugin
    overrides_of_model_kwargs:      # optional: train one budget of an elastic parent
      budget: 6b

axolotl loads models by transformers' Auto classes, where this package has put its own. Its own patches for sample packing
change transformers' class alone; ours keeps packed documents apart by itself.
"""

from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    """Nothing more to do: importing this file imported the package, which registered its classes."""
