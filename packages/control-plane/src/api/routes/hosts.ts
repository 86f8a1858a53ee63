/** /v1/hosts: for people who own machines, and for the agents on them. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import type { Services } from "../../service/services.ts";
import { accessTokenOf, callerOf } from "../authentication.ts";
import type { Api, ApiOptions } from "../context.ts";
import { answerOnce } from "../idempotency.ts";
import { renderHost, renderHostPage, renderRegistrationToken } from "../render-host.ts";
import { NoBody, PageQuery } from "../schemas/common.ts";
import {
  CreateHost,
  Heartbeat,
  HeartbeatAnswer,
  Host,
  HostPage,
  HostParams,
  HostRegistrationToken,
  RefreshedTokens,
  RefreshTokens,
  RegisterHost,
  Registration,
} from "../schemas/hosts.ts";

export async function hostRoutes(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/hosts",
    {
      config: {
        access: "key",
        isIdempotent: true,
        errors: ["forbidden", "already_exists", "quota_exceeded"],
      },
      schema: {
        tags: ["hosts"],
        operationId: "createHost",
        summary: "Make a host, and the token with which its agent registers within an hour",
        description: "type shared needs a platform key.",
        body: CreateHost,
        response: { 201: HostRegistrationToken },
      },
    },
    async (request, reply) =>
      answerOnce(services, request, reply, {
        make: (held) => services.createHost(callerOf(request), request.body, held),
        render: renderRegistrationToken,
      }),
  );

  app.post(
    "/v1/hosts/:id/token",
    {
      config: { access: "key", errors: ["wrong_state", "forbidden"] },
      schema: {
        tags: ["hosts"],
        operationId: "renewRegistrationToken",
        summary:
          "A new registration token for a pending, silent or revoked host; the old one is good no more",
        params: HostParams,
        body: NoBody,
        response: { 201: HostRegistrationToken },
      },
    },
    async (request, reply) => {
      const made = await services.newRegistrationToken(callerOf(request), request.params.id);
      return reply.code(201).send(renderRegistrationToken(made));
    },
  );

  app.get(
    "/v1/hosts",
    {
      config: { access: "key" },
      schema: {
        tags: ["hosts"],
        operationId: "listHosts",
        summary: "List hosts: the team's own, and with a platform key all",
        querystring: PageQuery,
        response: { 200: HostPage },
      },
    },
    async (request) => renderHostPage(await services.listHosts(callerOf(request), request.query)),
  );

  app.get(
    "/v1/hosts/:id",
    {
      config: { access: "key" },
      schema: {
        tags: ["hosts"],
        operationId: "getHost",
        summary: "Get a host",
        params: HostParams,
        response: { 200: Host },
      },
    },
    async (request) => renderHost(await services.getHost(callerOf(request), request.params.id)),
  );
}

export async function hostAgentRoutes(
  app: Api,
  services: Services,
  reach: ApiOptions["reach"] = () => undefined,
): Promise<void> {
  app.addHook("onSend", async ({ routeOptions: { config } }) => {
    if (config.exchange !== undefined) await reach(`${config.exchange}.answer.before`);
  });
  app.addHook("onResponse", async ({ routeOptions: { config } }) => {
    if (config.exchange !== undefined) await reach(`${config.exchange}.answer.after`);
  });
  app.post(
    "/v1/hosts/register",
    {
      config: { access: "agent", exchange: "register-host", errors: ["invalid_token"] },
      schema: {
        tags: ["agents"],
        operationId: "registerHost",
        summary: "An agent registers by its one-time token",
        body: RegisterHost,
        response: { 200: Registration },
      },
    },
    async ({ body }) => {
      const registration = await services.registerHost({
        token: body.token,
        address: body.address,
        certificateFingerprint: body.certificate_fingerprint,
        publicKey: body.public_key,
        proof: body.proof,
        arch: body.arch,
        cpus: body.cpus,
        memoryMb: body.memory_mb,
        diskMb: body.disk_mb,
        drivers: body.drivers,
        version: body.version,
      });
      return {
        host_id: registration.hostId,
        cluster_id: registration.clusterId,
        access_token: registration.accessToken,
        refresh_token: registration.refreshToken,
        control_plane_key: registration.controlPlaneKey,
      };
    },
  );

  app.post(
    "/v1/hosts/:id/heartbeat",
    {
      config: { access: "agent", exchange: "heartbeat-host", errors: ["invalid_token", "forbidden"] },
      schema: {
        tags: ["agents"],
        operationId: "heartbeat",
        summary: "An agent says that it lives, by its access token",
        params: HostParams,
        body: Heartbeat,
        response: { 200: HeartbeatAnswer },
      },
    },
    async (request) => {
      const { body } = request;
      const { acknowledgedEvent } = await services.heartbeat(accessTokenOf(request), request.params.id, {
        load: {
          cpus: body.load.cpus,
          memoryMbUsed: body.load.memory_mb_used,
          diskMbFree: body.load.disk_mb_free,
          sandboxes: body.load.sandboxes,
        },
        digest: body.digest,
        eventLogId: body.event_log_id,
        lastEventNumber: BigInt(body.last_event_number),
        snapshots: body.snapshots && { compat: body.snapshots.compat, storeId: body.snapshots.store_id },
      });
      return { acknowledged_event: Number(acknowledgedEvent) };
    },
  );

  app.post(
    "/v1/hosts/auth/refresh",
    {
      config: { access: "agent", exchange: "refresh-host", errors: ["invalid_token"] },
      schema: {
        tags: ["agents"],
        operationId: "refreshHostTokens",
        summary: "An agent renews its tokens",
        body: RefreshTokens,
        response: { 200: RefreshedTokens },
      },
    },
    async ({ body }) => {
      const tokens = await services.refreshHostTokens(body.refresh_token);
      return { access_token: tokens.accessToken, refresh_token: tokens.refreshToken };
    },
  );
}
