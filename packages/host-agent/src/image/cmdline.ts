/**
 * The guest's kernel arguments.
 *
 * Three parties write them: the image (here, the same on every host), the VMM
 * driver (`console=`, and under TCG or wherever the kernel cannot calibrate,
 * `tsc_early_khz=<the host's> tsc=reliable`: without these a boot under TCG is
 * a coin flip), and whoever boots the guest (`guestNetworkArgs`).
 */
import type { GuestAddressing } from "../guest-network/guest-network.ts";

export const IMAGE_KERNEL_ARGS: readonly string[] = [
  "quiet",
  // A panic ends the VM at once, by the triple fault that every VMM notices.
  "panic=-1",
  "reboot=t",
  "oops=panic",
  // Pages that were freed are zero, so they equal the memory base and no layer carries them.
  "init_on_free=1",
  // By default a touched page may dirty 2 MiB; only who asks (madvise) shall pay that in each layer.
  "transparent_hugepage=madvise",
  // Emulated timers fail the test although they work.
  "no_timer_check",
  // After a pause all of these see a time jump and report a hang that was none.
  "nowatchdog",
  "rcupdate.rcu_cpu_stall_suppress=1",
  // The kernel's tests of its own ciphers take an emulated guest a second.
  "cryptomgr.notests",
  // Nobody reads audit records here, and each execve would pay for one.
  "audit=0",
];

/** Understood by the guest's init, which gives them to eth0, the routes and /etc/resolv.conf. */
export function guestNetworkArgs(addressing: GuestAddressing): string {
  const args = [`rookery.address=${addressing.addressCidr}`, `rookery.gateway=${addressing.gateway}`];
  if (addressing.nameservers.length > 0) args.push(`rookery.dns=${addressing.nameservers.join(",")}`);
  return args.join(" ");
}
