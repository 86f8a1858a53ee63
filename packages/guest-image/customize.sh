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

# Nobody reads manuals in a sandbox. Not by dpkg's path-exclude: then mmdebstrap
# filters each package through a Python program, which costs half a minute.
find "$root/usr/share/doc" -mindepth 1 ! -type d ! -name copyright -delete
find "$root/usr/share/doc" -mindepth 1 -type d -empty -delete
rm -rf "$root/usr/share/man/"* "$root/usr/share/info/"* "$root/usr/share/locale/"* "$root/usr/share/lintian"

# dpkg need not sync each file: what a sandbox installs is as durable as the rest of its disk.
printf 'force-unsafe-io\n' >"$root/etc/dpkg/dpkg.cfg.d/rookery"

# Options that only the making of the tree needed.
rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root/var/log/"* "$root/var/cache/ldconfig/aux-cache"
