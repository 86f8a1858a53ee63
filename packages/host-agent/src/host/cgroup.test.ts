import { strict as assert } from "node:assert";
import { test } from "vitest";
import { parseCgroupMounts } from "./cgroup.ts";

test("a hybrid's mounts are told apart, co-mounted controllers included", () => {
  const mountinfo = [
    "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
    "30 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 master:1 - cgroup cgroup rw,memory",
    "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct",
    "32 25 0:28 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw,nsdelegate",
    "",
  ].join("\n");
  assert.deepEqual(parseCgroupMounts(mountinfo), {
    v1: [
      { mountPoint: "/sys/fs/cgroup/memory", options: ["rw", "memory"] },
      { mountPoint: "/sys/fs/cgroup/cpu,cpuacct", options: ["rw", "cpu", "cpuacct"] },
    ],
    v2: "/sys/fs/cgroup/unified",
  });
});

test("a machine without cgroups has no mounts", () => {
  assert.deepEqual(parseCgroupMounts(""), { v1: [], v2: undefined });
});
