/** POST /v1/sandboxes/{id}/exec: one command, to its end. */
import type { Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import { clientSignal } from "../client-signal.ts";
import type { Api } from "../context.ts";
import { renderExec } from "../render-exec.ts";
import { Exec, ExecAnswer, SandboxParams } from "../schemas/sandboxes.ts";

export async function execRoutes(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/sandboxes/:id/exec",
    {
      config: {
        access: "key",
        errors: [
          "wrong_state",
          "invalid_path",
          "file_not_found",
          "host_error",
          "guest_error",
          "host_unreachable",
          "timeout",
        ],
      },
      schema: {
        tags: ["commands and files"],
        operationId: "exec",
        summary: "Run a command to its end",
        description:
          "When timeout_sec is over, the command's whole process group is killed, and the answer says so. When the caller goes away, likewise.",
        params: SandboxParams,
        body: Exec,
        response: { 200: ExecAnswer.describe("It ended, however it did.") },
      },
    },
    async (request, reply) => {
      const { body } = request;
      const result = await services.exec(
        callerOf(request),
        request.params.id,
        {
          cmd: body.cmd,
          args: body.args,
          shell: body.shell,
          cwd: body.cwd,
          env: body.env,
          user: body.user,
          stdin: body.stdin === undefined ? undefined : Buffer.from(body.stdin),
          timeoutSec: body.timeout_sec,
        },
        clientSignal(reply),
      );
      return renderExec(result);
    },
  );
}
