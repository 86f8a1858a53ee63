/**
 * Who may import whom. Each rule is an arrow that must not turn back; see
 * docs/architecture.md for the picture.
 */
const agent = (folders) => `^packages/host-agent/src/(${folders})/`;
const plane = (folders) => `^packages/control-plane/src/(${folders})/`;
const tests = "\\.(test|contract)\\.ts$|/testing/";

/** `from` may import nothing of ours but what `allowed` matches. */
function only(name, from, allowed, comment) {
  return {
    name,
    comment,
    severity: "error",
    from: { path: from, pathNot: tests },
    to: { path: "^packages/", pathNot: [from, ...allowed] },
  };
}

export default {
  forbidden: [
    {
      name: "no-cycles",
      severity: "error",
      from: {},
      to: { circular: true, viaOnly: { dependencyTypesNot: ["type-only"] } },
    },
    {
      name: "no-tests-in-product",
      severity: "error",
      from: { path: "^packages/", pathNot: tests },
      to: { path: tests },
    },
    {
      name: "declared-dependencies",
      severity: "error",
      from: { path: "^packages/[^/]+/src/", pathNot: tests },
      to: { dependencyTypes: ["npm-dev", "npm-no-pkg", "npm-unknown", "unknown"] },
    },
    {
      name: "resolvable",
      severity: "error",
      from: {},
      to: { couldNotResolve: true },
    },

    only("protocol-stands-alone", "^packages/protocol/", [], "the wire knows nobody"),
    only("envd-is-alone-in-the-guest", "^packages/envd/", ["^packages/protocol/"], "it runs elsewhere"),

    only(
      "model-imports-nothing",
      plane("model"),
      ["^packages/protocol/src/errors"],
      "rules without machinery",
    ),
    only(
      "db-knows-the-model",
      plane("db"),
      [plane("model"), "^packages/protocol/src/errors"],
      "SQL and rows only",
    ),
    only(
      "hosts-knows-model-and-wire",
      plane("hosts"),
      [plane("model|db"), "^packages/protocol/"],
      "the only holder of RPC clients",
    ),
    only(
      "service-knows-no-front-end",
      plane("service"),
      [plane("model|db|hosts"), "^packages/protocol/src/errors"],
      "shared by every front end",
    ),
    only(
      "api-calls-services",
      plane("api"),
      [plane("model|service"), "^packages/protocol/src/errors"],
      "HTTP and nothing else",
    ),

    only(
      "host-is-the-ground",
      agent("host"),
      ["^packages/protocol/src/errors"],
      "thin access to the machine",
    ),
    only(
      "seams-know-no-manager",
      agent("vmm|root-disk|guest-network"),
      [agent("vmm|root-disk|guest-network|host"), "^packages/host-agent/src/ids", "^packages/protocol/"],
      "drivers are called, and never call",
    ),
    only(
      "manager-knows-no-wire",
      agent("sandbox-manager|vm-pool|journal|events"),
      [
        agent(
          "sandbox-manager|vm-pool|journal|events|vmm|root-disk|guest-network|warm-images|image|guest|host",
        ),
        "^packages/host-agent/src/ids",
        "^packages/protocol/src/(errors|failpoints|memory-compat)",
      ],
      "order, states, recovery",
    ),
    only(
      "rpc-decodes-and-calls",
      agent("rpc"),
      [agent("sandbox-manager|guest|host"), "^packages/host-agent/src/ids", "^packages/protocol/"],
      "the border of the agent",
    ),
    {
      name: "drivers-are-named-in-main",
      comment: "callers never ask which driver they hold",
      severity: "error",
      from: { path: agent("sandbox-manager|vm-pool|rpc|journal|events"), pathNot: tests },
      to: {
        path: "(vmm/(qemu|firecracker|simulated)|root-disk/(qcow2|device-mapper)|guest-network/(netns|user))",
      },
    },
    {
      name: "bench-and-tests-use-the-public-api",
      severity: "error",
      comment: "but for the fault suites, which look behind it",
      from: { path: "^(bench|test)/", pathNot: "^test/(faults|processes)/" },
      to: { path: "^packages/(control-plane|host-agent|envd)/src" },
    },
  ],
  options: {
    doNotFollow: { path: "node_modules" },
    exclude: { path: "(/dist/|/gen/)" },
    tsConfig: { fileName: "tsconfig.json" },
    tsPreCompilationDeps: true,
    enhancedResolveOptions: {
      exportsFields: ["exports"],
      conditionNames: ["import", "node", "default", "types"],
    },
  },
};
