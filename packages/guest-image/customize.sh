#!/bin/sh
# Last step of making the Debian tree (mmdebstrap --customize-hook): what needs
# the tree's own programs. $1 is the tree.
set -eu
root=$1

chroot "$root" useradd --uid 1000 --user-group --create-home --shell /bin/bash user
chroot "$root" passwd --lock root >/dev/null
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"

echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
: >"$root/etc/machine-id"
echo rookery >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
: >"$root/etc/fstab"

# Options that only the making of the tree needed.
rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root/var/log/"* "$root/var/cache/ldconfig/aux-cache"
