#!/bin/sh
# register-node.sh NODE: makes NODE a Rookery host. Run by an operator, with a
# platform key: the node itself only gets a one-time token, good for an hour.
#   ROOKERY_URL, ROOKERY_API_KEY   the API and its key
set -eu
[ $# -eq 1 ] || { echo "usage: register-node.sh NODE" >&2; exit 2; }
node=$1
: "${ROOKERY_URL:?}" "${ROOKERY_API_KEY:?}"

kubectl label node "$node" rookery.dev/host=true --overwrite
pod=""
until [ -n "$pod" ]; do
  pod=$(kubectl -n rookery get pods -l app=rookery-agent --field-selector "spec.nodeName=$node,status.phase=Running" -o name)
  [ -n "$pod" ] || sleep 2
done
# The key stands in no process's arguments.
token=$(printf 'header = "X-API-Key: %s"\n' "$ROOKERY_API_KEY" |
  curl -fsS -K - -H 'Content-Type: application/json' -X POST "$ROOKERY_URL/v1/hosts" \
    -d "{\"name\":\"$node\",\"type\":\"shared\",\"labels\":{\"node\":\"$node\"}}" |
  sed -n 's/.*"registration_token":"\([^"]*\)".*/\1/p')
[ -n "$token" ] || { echo "the API gave no token" >&2; exit 1; }
printf %s "$token" | kubectl -n rookery exec -i "$pod" -- sh -c 'umask 077; cat > /node/etc/rookery/token'
kubectl -n rookery delete "$pod"
echo "$node registers itself; see it online with GET $ROOKERY_URL/v1/hosts"
