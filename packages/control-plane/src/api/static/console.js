/*
 * The life of a sandbox on one page, by the public API alone.
 *
 * The key is kept for this tab only. Everything that comes from a sandbox is
 * shown as text, never as HTML.
 */
const $ = (id) => document.getElementById(id);
const MAX_LOG = 200;
let chosen;
let cursor;

/* Calls */

async function call(method, path, { json, form, as = "json" } = {}) {
  const began = performance.now();
  const headers = { "X-API-Key": $("key").value.trim() };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: json === undefined ? form : JSON.stringify(json) });
  } catch (error) {
    note(`${method} ${path}: ${error.message}`, true);
    throw error;
  }
  const took = `${Math.round(performance.now() - began)} ms`;
  if (!response.ok) {
    const answer = await response.json().catch(() => undefined);
    const why = answer?.error ? `${answer.error.code}: ${answer.error.message}` : response.statusText;
    note(`${method} ${path}: ${response.status} ${why}, ${took}`, true);
    throw new Error(why);
  }
  note(`${method} ${path}: ${response.status}, ${took}`, false);
  if (response.status === 204) return undefined;
  return as === "blob" ? response.blob() : response.json();
}

function note(text, isFailed) {
  const line = document.createElement("li");
  line.textContent = `${new Date().toLocaleTimeString()} ${text}`;
  line.classList.toggle("failed", isFailed);
  $("log").prepend(line);
  while ($("log").childElementCount > MAX_LOG) $("log").lastElementChild.remove();
}

/* A listener that does `action`, with its button off meanwhile. */
function acting(action) {
  return (event) => {
    event.preventDefault();
    void act(action, event);
  };
}

async function act(action, event) {
  const button = event.submitter ?? event.target.closest("button");
  if (button) button.disabled = true;
  try {
    await action(event);
  } catch (error) {
    // It also stands in the log.
    $("output").textContent = error.message;
  } finally {
    if (button) button.disabled = false;
  }
}

/* Lists */

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const place = document.createElement("td");
    place.append(cell ?? "");
    line.append(place);
  }
  return line;
}

function button(text, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", onClick);
  return made;
}

async function listSandboxes(isMore) {
  const query = new URLSearchParams({ limit: "50" });
  if ($("with-ended").checked) {
    query.set("status", "pending,starting,running,pausing,paused,resuming,missing,stopping,stopped,error");
  }
  if (isMore && cursor) query.set("cursor", cursor);
  const page = await call("GET", `/v1/sandboxes?${query}`);
  if (!isMore) $("sandboxes").replaceChildren();
  for (const sandbox of page.items) $("sandboxes").append(sandboxRow(sandbox));
  cursor = page.next_cursor;
  $("more").hidden = cursor === undefined;
}

function sandboxRow(sandbox) {
  const expires = sandbox.expires_at ? new Date(sandbox.expires_at).toLocaleTimeString() : "";
  const line = row([
    button(sandbox.id, () => choose(sandbox.id)),
    sandbox.error ? `${sandbox.status} (${sandbox.error.code})` : sandbox.status,
    sandbox.template,
    `${sandbox.vcpus} vCPU, ${sandbox.memory_mb} MB`,
    expires,
  ]);
  line.classList.toggle("chosen", sandbox.id === chosen);
  return line;
}

async function listSnapshots() {
  const { items } = await call("GET", "/v1/snapshots?limit=200");
  $("snapshots").replaceChildren(
    ...items.map((snapshot) =>
      row([
        snapshot.name,
        `${snapshot.vcpus} vCPU, ${snapshot.memory_mb} MB`,
        `${(snapshot.size_bytes / 1048576).toFixed(1)} MiB`,
        button(
          "Delete",
          acting(async () => {
            await call("DELETE", `/v1/snapshots/${encodeURIComponent(snapshot.name)}`);
            await listSnapshots();
          }),
        ),
      ]),
    ),
  );
}

async function refresh() {
  if ($("key").value.trim() === "") return;
  await listSandboxes(false);
  await listSnapshots();
}

/* One sandbox */

async function choose(id) {
  chosen = id;
  $("one").hidden = false;
  $("chosen").textContent = id;
  $("output").textContent = "";
  await showChosen();
}

async function showChosen() {
  const sandbox = await call("GET", `/v1/sandboxes/${chosen}`);
  $("status").textContent = sandbox.error ? `${sandbox.status}: ${sandbox.error.message}` : sandbox.status;
  await listSandboxes(false);
}

const number = (text) => (text.trim() === "" ? undefined : Number(text));

function showOutput(result) {
  const words = [
    result.signal ? `signal ${result.signal}` : `exit ${result.exit_code}`,
    `${result.duration_ms} ms`,
  ];
  if (result.timed_out) words.push("timed out");
  if (result.truncated) words.push("output was cut");
  if (result.encoding !== "utf-8") words.push(`output is ${result.encoding}`);
  $("output").textContent =
    `${result.stdout}${result.stderr && `\n--- stderr\n${result.stderr}`}\n--- ${words.join(", ")}`;
}

/* Wiring */

$("create").addEventListener(
  "submit",
  acting(async ({ target }) => {
    const values = Object.fromEntries(new FormData(target));
    const sandbox = await call("POST", "/v1/sandboxes", {
      json: {
        template: values.template,
        vcpus: number(values.vcpus),
        memory_mb: number(values.memory_mb),
        timeout_sec: number(values.timeout_sec),
        on_timeout: values.on_timeout,
      },
    });
    await choose(sandbox.id);
  }),
);

$("actions").addEventListener(
  "click",
  acting(async ({ target }) => {
    const { action } = target.dataset;
    if (action === undefined) return;
    if (action === "destroy") await call("DELETE", `/v1/sandboxes/${chosen}`);
    else await call("POST", `/v1/sandboxes/${chosen}/${action}`);
    await showChosen();
  }),
);

$("exec").addEventListener(
  "submit",
  acting(async ({ target }) => {
    const values = new FormData(target);
    const result = await call("POST", `/v1/sandboxes/${chosen}/exec`, {
      json: {
        cmd: values.get("cmd"),
        shell: values.get("shell") !== null,
        timeout_sec: number(values.get("timeout_sec")),
      },
    });
    showOutput(result);
  }),
);

$("write").addEventListener(
  "submit",
  acting(async ({ target }) => {
    const values = new FormData(target);
    // The API wants path before file, in this order.
    const form = new FormData();
    form.append("path", values.get("path"));
    form.append("file", values.get("file"));
    await call("POST", `/v1/sandboxes/${chosen}/files/write`, { form });
  }),
);

$("read").addEventListener(
  "submit",
  acting(async ({ target }) => {
    const path = new FormData(target).get("path");
    const blob = await call("POST", `/v1/sandboxes/${chosen}/files/read`, { json: { path }, as: "blob" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = path.split("/").at(-1) || "file";
    link.click();
    // Some browsers read it only after the click.
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }),
);

$("snapshot").addEventListener(
  "submit",
  acting(async ({ target }) => {
    const values = new FormData(target);
    await call("POST", "/v1/snapshots", {
      json: { sandbox_id: chosen, name: values.get("name"), overwrite: values.get("overwrite") !== null },
    });
    await listSnapshots();
  }),
);

$("refresh").addEventListener("click", acting(refresh));
$("more").addEventListener(
  "click",
  acting(() => listSandboxes(true)),
);
$("with-ended").addEventListener(
  "change",
  acting(() => listSandboxes(false)),
);
$("key").addEventListener(
  "change",
  acting(async () => {
    sessionStorage.setItem("key", $("key").value.trim());
    await refresh();
  }),
);

$("key").value = sessionStorage.getItem("key") ?? "";
refresh().catch((error) => note(error.message, true));
