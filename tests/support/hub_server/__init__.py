"""A loopback server that speaks the part of the Hugging Face Hub's protocol that the Python clients use.

The unmodified clients (`huggingface_hub`, `datasets`, `transformers`, `trl`, `peft`, `evaluate`) work against it through
`HF_ENDPOINT`, in Xet mode (their default) and in LFS mode (`HF_HUB_DISABLE_XET=1`). Standard library only.

```python
with HubServer(tmp_path) as hub:
    hub.fail(r"POST /api/datasets/.*/commit/", "lost")
    run_client("from huggingface_hub import whoami; print(whoami()['name'])", hub)
    assert hub.count(r"GET /api/whoami-v2") == 1
```
"""

from .client import Client, ClientResult, client_environment, run_client, start_client, start_session
from .server import HubServer


__all__ = ["Client", "ClientResult", "HubServer", "client_environment", "run_client", "start_client", "start_session"]
