"""Every endpoint that takes a body."""

from mlx_drift.serve.api.asking import Dialect
from mlx_drift.serve.api.chat import Chat
from mlx_drift.serve.api.completions import Completions
from mlx_drift.serve.api.messages import Messages
from mlx_drift.serve.api.messages_fields import COUNT_TOKENS
from mlx_drift.serve.api.responses import Responses
from mlx_drift.serve.api.tables import TOKENIZE

DIALECTS: tuple[Dialect, ...] = (Chat(), Completions(), Messages(), Responses())
"""Those that generate."""

EVERY = (*(dialect.fields for dialect in DIALECTS), COUNT_TOKENS, TOKENIZE)
"""Their keys."""
