#!/bin/sh
# Installs this image's release on the node and (re)starts its agent where the
# release or the settings changed; then stays, so that the pod stands for it.
# Each step may be cut off and run again: files take their place by rename.
set -eu
release=/opt/rookery
version=$(cat "$release/VERSION")
on_node() { nsenter -t 1 -m -u -i -n -p -- "$@"; }

target=/opt/rookery-$version
if [ ! -e "/node$target" ]; then
  rm -rf "/node$target.new"
  cp -a "$release" "/node$target.new"
  mv "/node$target.new" "/node$target"
fi
ln -sfn "$target" /node/opt/rookery.new
mv -T /node/opt/rookery.new /node/opt/rookery

mkdir -p /node/etc/rookery
chmod 700 /node/etc/rookery
{
  cat /settings/agent.env
  echo "ROOKERY_AGENT_ADDRESS=$NODE_ADDRESS:7071"
  # One-time, put there by register-node.sh; an agent that is registered ignores it.
  if [ -s /node/etc/rookery/token ]; then echo "ROOKERY_REGISTRATION_TOKEN=$(cat /node/etc/rookery/token)"; fi
} > /node/etc/rookery/agent.env.new
chmod 600 /node/etc/rookery/agent.env.new

changed=no
cmp -s /node/etc/rookery/agent.env.new /node/etc/rookery/agent.env || changed=yes
mv /node/etc/rookery/agent.env.new /node/etc/rookery/agent.env
unit=/node/etc/systemd/system/rookery-agent.service
cmp -s "$release/deploy/systemd/rookery-agent.service" "$unit" || changed=yes
[ "$(cat /node/etc/rookery/version 2>/dev/null || true)" = "$version" ] || changed=yes
cp "$release/deploy/systemd/rookery-agent.service" "$unit.new"
mv "$unit.new" "$unit"

on_node "$target/bin/rookery-agent" doctor --data /var/lib/rookery/agent
on_node "$target/bin/rookery-agent" image build base --data /var/lib/rookery/agent
on_node systemctl daemon-reload
on_node systemctl enable --quiet rookery-agent
if [ "$changed" = yes ]; then on_node systemctl restart rookery-agent; else on_node systemctl start rookery-agent; fi
echo "$version" > /node/etc/rookery/version
echo "rookery-agent $version is installed"
exec sleep infinity
