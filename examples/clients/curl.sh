#!/bin/sh
# Every endpoint of `mlx-drift serve`, asked with curl.
#
#     mlx-drift serve &
#     sh examples/clients/curl.sh
set -eu
BASE=${BASE:-http://127.0.0.1:8080}
KEY=${MLX_DRIFT_API_KEY:-none}

ask() {
    echo "--- $1"
    curl --silent --show-error --fail-with-body --no-buffer "$BASE$1" \
        -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d "$2"
    echo
}

ask /v1/chat/completions '{
    "messages": [{"role": "user", "content": "What does `shutil.copytree` do?"}],
    "max_tokens": 20
}'
ask /v1/chat/completions '{
    "messages": [{"role": "user", "content": "What does `shutil.copytree` do?"}],
    "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true}
}'
ask /v1/responses '{"input": "What does `shutil.copytree` do?", "max_output_tokens": 20}'
ask /v1/messages '{
    "messages": [{"role": "user", "content": "What does `shutil.copytree` do?"}],
    "max_tokens": 20
}'
ask /v1/messages/count_tokens '{"messages": [{"role": "user", "content": "How long is this?"}]}'
ask /v1/completions '{"prompt": "def quote(s):", "max_tokens": 12}'
ask /tokenize '{"prompt": "def quote(s):"}'

echo "--- /v1/models"
curl --silent --show-error --fail-with-body "$BASE/v1/models" -H "Authorization: Bearer $KEY"
echo
