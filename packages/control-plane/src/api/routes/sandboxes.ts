/** /v1/sandboxes: the life of sandboxes. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import { z } from "zod";
import type { SandboxId } from "../../model/ids.ts";
import type { Sandbox as SandboxModel } from "../../model/sandbox.ts";
import type { Caller, Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import type { Api } from "../context.ts";
import { answerOnce } from "../idempotency.ts";
import { renderSandbox, renderSandboxPage } from "../render-sandbox.ts";
import { NoBody } from "../schemas/common.ts";
import {
  CreateSandbox,
  ListSandboxesQuery,
  Sandbox,
  SandboxPage,
  SandboxParams,
  UpdateSandbox,
} from "../schemas/sandboxes.ts";

const tags = ["sandboxes"];
/** What an operation that needs the sandbox's host can meet. */
const HOST_ERRORS = ["host_error", "host_unreachable", "timeout"] as const;

export async function sandboxRoutes(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/sandboxes",
    {
      config: {
        access: "key",
        isIdempotent: true,
        errors: [
          ...HOST_ERRORS,
          "template_not_found",
          "unsupported_shape",
          "quota_exceeded",
          "no_capacity",
          "guest_error",
          "out_of_disk",
        ],
      },
      schema: {
        tags,
        operationId: "createSandbox",
        summary: "Make a sandbox; answers when it runs",
        body: CreateSandbox,
        response: { 201: Sandbox.describe("It runs.") },
      },
    },
    async (request, reply) =>
      answerOnce(services, request, reply, {
        make: (held) => {
          const { body } = request;
          const input = {
            template: body.template,
            vcpus: body.vcpus,
            memoryMb: body.memory_mb,
            diskMb: body.disk_mb,
            timeoutSec: body.timeout_sec,
            onTimeout: body.on_timeout,
            timeoutMode: body.timeout_mode,
            env: body.env,
            metadata: body.metadata,
          };
          return services.createSandbox(callerOf(request), input, held);
        },
        render: renderSandbox,
      }),
  );

  app.get(
    "/v1/sandboxes",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "listSandboxes",
        summary: "List sandboxes, newest first",
        querystring: ListSandboxesQuery,
        response: { 200: SandboxPage.describe("A page; next_cursor is absent on the last one.") },
      },
    },
    async (request) => renderSandboxPage(await services.listSandboxes(callerOf(request), request.query)),
  );

  app.get(
    "/v1/sandboxes/:id",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "getSandbox",
        summary: "Get a sandbox, also one that has ended",
        params: SandboxParams,
        response: { 200: Sandbox },
      },
    },
    async (request) => renderSandbox(await services.getSandbox(callerOf(request), request.params.id)),
  );

  app.patch(
    "/v1/sandboxes/:id",
    {
      config: { access: "key", errors: [...HOST_ERRORS, "wrong_state"] },
      schema: {
        tags,
        operationId: "updateSandbox",
        summary: "Change its lifetime or metadata",
        params: SandboxParams,
        body: UpdateSandbox,
        response: { 200: Sandbox },
      },
    },
    async (request) => {
      const { body } = request;
      const sandbox = await services.updateSandbox(callerOf(request), request.params.id, {
        timeoutSec: body.timeout_sec,
        onTimeout: body.on_timeout,
        timeoutMode: body.timeout_mode,
        metadata: body.metadata,
      });
      return renderSandbox(sandbox);
    },
  );

  app.delete(
    "/v1/sandboxes/:id",
    {
      config: { access: "key", errors: HOST_ERRORS },
      schema: {
        tags,
        operationId: "destroySandbox",
        summary: "Destroy it; answers when its resources are gone. Again: the same answer",
        params: SandboxParams,
        body: NoBody,
        response: { 204: z.undefined().describe("Gone.") },
      },
    },
    async (request, reply) => {
      await services.destroySandbox(callerOf(request), request.params.id);
      return reply.code(204).send();
    },
  );

  for (const [action, summary, move] of [
    [
      "pause",
      "Freeze it with its memory and free what it holds of the host",
      (caller, id) => services.pauseSandbox(caller, id),
    ],
    [
      "resume",
      "Bring a paused sandbox back, on another host where its own drains",
      (caller, id) => services.resumeSandbox(caller, id),
    ],
  ] satisfies [string, string, (caller: Caller, id: SandboxId) => Promise<SandboxModel>][]) {
    app.post(
      `/v1/sandboxes/:id/${action}`,
      {
        config: {
          access: "key",
          errors: [...HOST_ERRORS, "wrong_state", "guest_error", "out_of_disk", "no_capacity"],
        },
        schema: {
          tags,
          operationId: `${action}Sandbox`,
          summary,
          params: SandboxParams,
          body: NoBody,
          response: { 200: Sandbox },
        },
      },
      async (request) => renderSandbox(await move(callerOf(request), request.params.id)),
    );
  }

  app.post(
    "/v1/sandboxes/:id/ping",
    {
      config: { access: "key", errors: [...HOST_ERRORS, "wrong_state"] },
      schema: {
        tags,
        operationId: "pingSandbox",
        summary: "Begin its idle time anew",
        params: SandboxParams,
        body: NoBody,
        response: { 204: z.undefined().describe("Done.") },
      },
    },
    async (request, reply) => {
      await services.pingSandbox(callerOf(request), request.params.id);
      return reply.code(204).send();
    },
  );
}
